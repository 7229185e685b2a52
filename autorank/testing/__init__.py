"""Contract tests for people who add a format of their own; they need pytest, which autorank itself does not."""
