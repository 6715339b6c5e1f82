"""The status page: what the fleet does now, for people who would rather look than query."""
