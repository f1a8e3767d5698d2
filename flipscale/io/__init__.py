"""Files that a kill, a full disk or a second writer cannot leave half written."""
