"""Evaluation: language modelling scores, Matrix Nuclear-Norm, speed, and the gates that judge a report."""
