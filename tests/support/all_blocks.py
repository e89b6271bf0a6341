"""What packs with a first-block cache do to a transformer."""

import torch


class AllBlocks(torch.nn.Module):
    """One module in the place of all blocks."""

    def __init__(self, double_blocks, single_blocks):
        super().__init__()
        self.double_blocks, self.single_blocks = double_blocks, single_blocks

    def forward(self, img, txt, **kwargs):
        for block in self.double_blocks:
            img, txt = block(img=img, txt=txt, **kwargs)
        x = torch.cat((txt, img), dim=1)
        for block in self.single_blocks:
            x = block(x, **kwargs)
        return x[:, txt.shape[1]:], txt
