"""What this machine offers, and what is missing: facts, checks over facts, findings."""
