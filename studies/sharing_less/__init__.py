"""What is left to an attacker where less is shared, and what rounds add."""
