"""Costs, the choice inside blocks, the stage ILP, and the search over meshes."""
