"""Released heads on frozen backbones, as plain modules: tokens in; classes, depth, masks, boxes, embeddings out."""
