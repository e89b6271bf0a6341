"""Pairs that need no model, by arithmetic on the pixels: one file a family of effects (docs/model.md, Training pairs).

A maker gets a picture, uint8 [H, W, 3], and a random generator, and gives source and target; None where the picture has
nothing for it to work on. Where an effect can be read both ways, the picture itself is the target of one: "remove the
fog" has a real target.
"""
