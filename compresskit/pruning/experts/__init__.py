"""Pruning of experts: fewer in every block, by removing some or by merging alike ones, with the router's rows."""
