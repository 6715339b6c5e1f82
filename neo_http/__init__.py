"""OpenAI's HTTP API on top of neo.v1.InferenceService; a service plugs in how calls are made."""
