"""Runs workflows without a ComfyUI server, and prepares model folders."""
