"""The federated loop: cohort, local training, server step, evaluation, record."""
