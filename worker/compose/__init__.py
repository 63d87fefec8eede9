"""The derived objects of one result: what they say about their making, their pixels and their marks."""
