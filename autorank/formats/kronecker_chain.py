"""What GKPD and SeKron share: factors over digits of the channels and of the kernel, run from the last to the first."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from autorank.formats.base import Factors, Options, Roots
from autorank.formats.chain import ChainFormat
from autorank.formats.steps import Step
from autorank.solvers.kronecker import Shape
from autorank.solvers.kronecker_weighted import weighted_sekron
from autorank.types import LayerSpec, Scalar


class KroneckerChain(ChainFormat):
    """A sum of Kronecker products of N factors, whose shapes (t_i, s_i, k_i1, ..., k_id) multiply to the layer's.

    The shapes are an option, written ``T1xS1xK1x…`` (per group; all but the last factor's, which follows by division).
    In a search space a word may stand for a shape of each layer's own; plans have the shapes themselves.

    The factors run from the last to the first. Digits of the input channels that no factor has summed over yet are in
    the batch, and so are the digits of the output channels that are made already; the rank indices of the factors
    before it are groups. A factor's convolution is dilated by the kernel sizes of those that ran before it.
    """

    shape_option: ClassVar[str]

    @abstractmethod
    def words(self, spec: LayerSpec) -> dict[str, tuple[Shape, ...]]:
        """Return the shapes, the last factor's left out, that words stand for; only those that the layer can have."""

    @abstractmethod
    def factor_names(self, count: int) -> tuple[str, ...]:
        """Return the names of the factors, the first one first."""

    @abstractmethod
    def level_ranks(self, shapes: Sequence[Shape], rank: tuple[int, ...]) -> tuple[int, ...]:
        """Return R_1, ..., R_{N-1} of a rank as plans have it."""

    def shapes(self, spec: LayerSpec, options: Options = ()) -> tuple[Shape, ...]:
        """Return the shapes of all factors: what the option says, or the first word."""
        text = dict(options).get(self.shape_option)
        given = next(iter(self.words(spec).values())) if text is None else parse(str(text))
        return complete(given, whole(spec))

    def variants(self, spec: LayerSpec) -> tuple[Options, ...]:
        """Return an option set for each word that the layer has a shape for."""
        texts = dict.fromkeys(as_text(shapes) for shapes in self.words(spec).values())
        return tuple(((self.shape_option, text),) for text in texts)

    def option_sets(self, spec: LayerSpec, wanted: Mapping[str, Sequence[Scalar]]) -> tuple[Options, ...]:
        """Return an option set for each shape or word that is asked for, or the variants."""
        if self.shape_option not in wanted:
            return self.variants(spec)
        words = {word: as_text(shapes) for word, shapes in self.words(spec).items()}
        texts = [words.get(str(value), str(value)) for value in wanted[self.shape_option]]
        fitting = (text for text in dict.fromkeys(texts) if self._misfit(spec, text) is None)
        return tuple(((self.shape_option, text),) for text in fitting)

    def wrong_value(self, spec: LayerSpec, key: str, value: Scalar) -> str | None:
        """Return what a search space may ask for where `value` is no word and no shape that the layer can have."""
        if key != self.shape_option:
            return super().wrong_value(spec, key, value)
        if value in self.all_words() or self._misfit(spec, value) is None:
            return None
        return f"allowed for layer {spec.name!r} are {', '.join(self.all_words())}, or {self._rule(spec)}"

    @classmethod
    @abstractmethod
    def all_words(cls) -> tuple[str, ...]:
        """Return the words that stand for shapes."""

    def input_axes(self, spec: LayerSpec, options: Options = ()) -> tuple[int, ...]:
        """Return all kernel axes: the weighted fit takes any covariance."""
        return tuple(range(len(spec.kernel)))

    def input_names(self, spec: LayerSpec, options: Options = ()) -> tuple[str, ...]:
        """Return the digits of the input channels."""
        return _numbered("s", len(self.shapes(spec, options)))

    def output_names(self, spec: LayerSpec, options: Options = ()) -> tuple[str, ...]:
        """Return the digits of the output channels."""
        return _numbered("t", len(self.shapes(spec, options)))

    def sizes(self, spec: LayerSpec, rank: tuple[int, ...], options: Options = ()) -> dict[str, int]:
        """Return the sizes of the digits, and the ranks r1, r2 and so on."""
        shapes = self.shapes(spec, options)
        found: dict[str, int] = {}
        for i, (t, s, *_) in enumerate(shapes, 1):
            found |= {f"t{i}": t, f"s{i}": s}
        levels = self.level_ranks(shapes, rank)
        return found | dict(zip(_numbered("r", len(levels)), levels, strict=True))

    def steps(self, spec: LayerSpec, rank: tuple[int, ...], options: Options = ()) -> tuple[Step, ...]:
        """Return one convolution per factor, the last factor first."""
        shapes = self.shapes(spec, options)
        count, axes = len(shapes), tuple(range(len(spec.kernel)))
        ranks, names = _numbered("r", count - 1), self.factor_names(count)
        found = [Step(names[-1], (*ranks, f"t{count}"), (f"s{count}",), axes=axes, kernel=shapes[-1][2:])]
        for i in range(count - 2, -1, -1):
            into, along = (ranks[i], f"s{i + 1}"), ranks[:i]
            found.append(Step(names[i], (f"t{i + 1}",), into, along, axes, shapes[i][2:]))
        return tuple(found)

    # Checks

    def _wrong_option(self, spec: LayerSpec, options: Mapping[str, Scalar]) -> str | None:
        text = options.get(self.shape_option)
        if text is not None and self._misfit(spec, text) is not None:
            return f"{spec.kind}: option {self.shape_option} must be {self._rule(spec)}, not {text!r}"
        return super()._wrong_option(spec, {key: value for key, value in options.items() if key != self.shape_option})

    def _own_options(self, spec: LayerSpec) -> Mapping[str, tuple[Scalar, ...]]:
        return {self.shape_option: tuple(as_text(shapes) for shapes in self.words(spec).values())}

    def _refuse(self, spec: LayerSpec, options: Options) -> str | None:
        if dict(options).get(self.shape_option) is not None or self.words(spec):
            return None
        return f"{spec.kind}: the sizes {_product(whole(spec))} cannot be shared out between the factors of {self.name}"

    def _misfit(self, spec: LayerSpec, text: Scalar) -> str | None:
        """Return what is wrong with the text of an option."""
        try:
            given = parse(str(text))
        except ValueError:
            return "not a shape"
        found = self._allowed_count(len(given)) and fits(given, whole(spec))
        return None if found else "not shapes of this layer"

    @abstractmethod
    def _allowed_count(self, given: int) -> bool:
        """Say whether so many shapes may be given."""

    @abstractmethod
    def _rule(self, spec: LayerSpec) -> str:
        """Return in words which texts the option may be for this layer."""

    # Fitting

    def _fit_weighted(
        self, weight: Tensor, roots: Roots, spec: LayerSpec, rank: tuple[int, ...], options: Options, seed: int
    ) -> Factors:
        """Fit by alternating weighted least squares from the unweighted fit, or from a better start."""
        shapes = self.shapes(spec, options)
        found = weighted_sekron(weight, shapes, self.level_ranks(shapes, rank), roots.input, roots.output)
        return self._from_solver(found, spec, rank, options)

    def _from_solver(
        self, found: Sequence[Tensor], spec: LayerSpec, rank: tuple[int, ...], options: Options
    ) -> Factors:
        """Return factors (groups, R_1·…·R_i, m_i) as they are stored."""
        shapes = self.shapes(spec, options)
        names, levels = self.factor_names(len(shapes)), self.level_ranks(shapes, rank)
        named = {names[-1]: found[-1]}
        for name, factor, shape, level in zip(names, found[:-1], shapes, levels, strict=False):
            digits = factor.reshape(factor.shape[0], -1, level, shape[0], math.prod(shape[1:]))
            named[name] = digits.transpose(2, 3)
        return self._pack(named, spec, rank, options)


# Shapes and their texts


def whole(spec: LayerSpec) -> Shape:
    """Return the shape (T/groups, S/groups, K1, ..., Kd) that the factors' shapes multiply to."""
    return (spec.out_channels // spec.groups, *spec.weight_shape[1:])


def parse(text: str) -> tuple[Shape, ...]:
    """Return the shapes that a text names, such as ``4x4x1x1/4x4x3x3``; ValueError when it names none."""
    shapes = tuple(tuple(int(size) for size in part.split("x")) for part in text.split("/"))
    if as_text(shapes) != text:
        raise ValueError(text)
    return shapes


def as_text(shapes: Sequence[Shape]) -> str:
    """Return the text of some shapes."""
    return "/".join(_product(shape) for shape in shapes)


def _product(shape: Shape) -> str:
    return "x".join(map(str, shape))


def complete(given: Sequence[Shape], total: Shape) -> tuple[Shape, ...]:
    """Return the shapes with the last factor's, which makes them multiply to `total`."""
    products = [math.prod(shape[mode] for shape in given) for mode in range(len(total))]
    return (*given, tuple(size // product for size, product in zip(total, products, strict=True)))


def fits(given: Sequence[Shape], total: Shape) -> bool:
    """Say whether shapes divide `total`, and no factor, the last one included, has all sizes one."""
    if any(len(shape) != len(total) or min(shape) < 1 for shape in given):
        return False
    if any(size % math.prod(shape[mode] for shape in given) for mode, size in enumerate(total)):
        return False
    return all(math.prod(shape) > 1 for shape in complete(given, total))


def near(size: int, target: float) -> int:
    """Return the divisor of `size` whose ratio to `target` is nearest to one; the larger of two."""
    divisors = [divisor for divisor in range(1, size + 1) if size % divisor == 0]
    return min(reversed(divisors), key=lambda divisor: round(abs(math.log(divisor / target)), 9))


def _numbered(letter: str, count: int) -> tuple[str, ...]:
    return tuple(f"{letter}{i}" for i in range(1, count + 1))
