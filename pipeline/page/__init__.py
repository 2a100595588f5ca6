"""Pages for a person to open: self-contained HTML, no script or picture from elsewhere."""
