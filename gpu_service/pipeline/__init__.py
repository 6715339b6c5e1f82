"""How a plan runs: batches, attention of each tier, migrations, and one module per mode."""
