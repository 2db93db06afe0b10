"""Runs API-format workflows without a ComfyUI server, and downloads and quantizes checkpoints.

Nothing but quickstart.py and the tests imports this package.
"""
