"""Where the node library lists the nodes: one folder, with what few people need below it."""

MAIN = "Step1X-Edit"
TRAINING = f"{MAIN}/training"
EVALUATION = f"{MAIN}/evaluation"
