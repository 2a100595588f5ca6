"""Files that leave the project: adapter formats, lineage, model card."""
