"""Rows of token ids, padded by hand."""

import torch


ROWS = [[7, 8, 9, 10, 11, 12, 13, 14, 15], [16, 17, 18], [19, 20, 21, 22, 23, 24]]


def pad(rows, side):
    """ids and mask with the padding on one side, or two tokens of it on both."""
    width = max(map(len, rows)) + (4 if side == "both" else 0)
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    starts = []
    for i, row in enumerate(rows):
        start = {"right": 0, "left": width - len(row), "both": 2}[side]
        ids[i, start : start + len(row)] = torch.tensor(row)
        mask[i, start : start + len(row)] = 1
        starts.append(start)
    return ids, mask, starts
