"""When a search has stalled: the hypervolume has not grown for a number of points."""

from __future__ import annotations


class Stall:
    """Follows the hypervolume from point to point.

    Parameters
    ----------
    patience : int
        Points without growth after which the search has stalled; 0 for never.
    tolerance : float
        Growth, as a fraction of the volume, that does not count as growth.
    """

    def __init__(self, patience: int, tolerance: float) -> None:
        self.patience, self.tolerance = patience, tolerance
        self._mark = self._since = 0.0
        self._points = 0

    def point(self, volume: float) -> None:
        """Take the volume after one more point."""
        self._points += 1
        if volume > self._mark * (1.0 + self.tolerance) or self._points == 1:
            self._mark, self._since = volume, 0
        else:
            self._since += 1

    @property
    def reason(self) -> str:
        """Why it is time to stop, in one line; empty while it is not."""
        if not self.patience or self._since < self.patience:
            return ""
        return (
            f"the hypervolume has grown by less than {self.tolerance:.2%} in the last {int(self._since)} points "
            f"(of {self._points}; options patience and tolerance)"
        )
