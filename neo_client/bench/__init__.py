"""The load generator behind `neo bench`. No torch."""
