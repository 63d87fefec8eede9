"""Networks: their training, averaging and export. Nothing here is needed to process a study."""
