from autorank import strategies
from autorank.strategies.knapsack import Knapsack
from autorank.testing.strategies import StrategyContract

if "knapsack" not in strategies.names():
    strategies.register(Knapsack)


class TestKnapsack(StrategyContract):
    name = "knapsack"
    seeded = False


class TestKnapsackOfFewPoints(StrategyContract):
    name = "knapsack"
    options = {"points": 4, "predictor": "shrunk"}  # noqa: RUF012
    seeded = False
