"""The gpu_service's front end: what clients say becomes engine commands, tokens become text.

No torch in this process: a decode step must not share an interpreter with tokenisation and gRPC.
"""
