"""A backbone with a head: pictures in; classes, depth, masks, boxes, likeness to texts out, at their own pixels."""
