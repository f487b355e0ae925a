"""Devices, links and model architectures as data files, each figure with its source."""
