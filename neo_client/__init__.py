"""Clients of NEO Serving (`Client`, `AsyncClient`) and the `neo` command. No torch."""

from neo_client.aio import AsyncClient
from neo_client.client import Client
from neo_client.connect import Retries, Tls
from neo_client.options import Sampling, Scheduling, Structured

__all__ = ["AsyncClient", "Client", "Retries", "Sampling", "Scheduling", "Structured", "Tls"]
