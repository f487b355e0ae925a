"""The small runtime that travels with emitted code: plain PyTorch, one idea per file."""
