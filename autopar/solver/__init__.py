"""Costs, the intra-block and stage ILPs, and the search over meshes."""
