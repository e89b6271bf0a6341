"""Where the node library lists the nodes, and what the search finds them by.

The library has one folder, with the rarely used nodes below it.
"""

MAIN = "Step1X-Edit"
TRAINING = f"{MAIN}/training"
EVALUATION = f"{MAIN}/evaluation"

# What people type who do not know the name. The five nodes of a plain edit and the blueprint's file have them. The
# search only ranks by id and display name, so the ids of these five are short.
EDIT_ALIASES = ["edit image", "edit picture", "edit photo", "image edit", "edit by instruction"]
