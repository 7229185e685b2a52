from autorank.testing.strategies import StrategyContract


class TestRandom(StrategyContract):
    name = "random"


class TestTPE(StrategyContract):
    name = "tpe"


class TestNSGA2(StrategyContract):
    name = "nsga2"
    options = {"population": 8}  # noqa: RUF012
