"""Inputs that are valid, nearly valid and wild for the files that people hand to autorank, and what must hold for each.

A target's `check` reads one file as autorank does. It returns whether the file was accepted, and raises when a rule is
broken that does not depend on autorank's own readers: a refusal is one printable line; what is accepted keeps all that
the file says, and means the same after it was written again.
"""

from tests.fuzzing.common import BrokenError, Target
from tests.fuzzing.result_files import JOURNAL, PLAN_FILE
from tests.fuzzing.settings_files import SPACE_FILE, SWEEP_FILE

TARGETS = (SWEEP_FILE, SPACE_FILE, PLAN_FILE, JOURNAL)

__all__ = ["TARGETS", "BrokenError", "Target"]
