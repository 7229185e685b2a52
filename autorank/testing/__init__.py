"""Contract tests that every format and every strategy must pass, shipped for people who add their own."""
