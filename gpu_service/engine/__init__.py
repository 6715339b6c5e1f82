"""The engine core and what its process says and hears. Importing this package imports no torch."""
