"""The use-cases: each takes values and rooms below, returns a report."""
