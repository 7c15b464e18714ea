"""Keys and values of a batch that decodes: written a column at a time, and rows leave it.

Imports transformers, and is imported where decoding starts (see `models`).
"""

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer with spare columns, so that a step writes one column and copies none."""

    spare = 64

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.room = [key_states.contiguous(), value_states.contiguous()]
            self.keys, self.values = self.room
            return self.keys, self.values
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        if end > self.room[0].shape[2]:
            self.room = [
                torch.nn.functional.pad(held, (0, 0, 0, self.spare)) for held in (self.keys, self.values)
            ]
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, start:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self.room)
        return self.keys, self.values

    def keep_rows(self, index_N):
        """Keep (and repeat) rows by index, with the columns in use."""
        self.keys, self.values = self.room = [
            held.index_select(0, index_N) for held in (self.keys, self.values)
        ]


def start_cache(config):
    """An empty cache for a model with this config; one with sliding windows gets that of transformers."""
    if "sliding_attention" in getattr(config, "layer_types", ()):
        return DynamicCache(config=config)
    return Cache(layers=[RoomyLayer() for _ in range(config.num_hidden_layers)])
