"""What the faces share: the hub's options as fields, and the forms in which clients write messages and tools."""
