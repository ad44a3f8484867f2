"""Devices, precision, memory and progress."""
