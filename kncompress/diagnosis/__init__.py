"""What this machine has and what it lacks: findings, each with what to do about it. Nothing here raises for a lack."""
