"""Where chunks are kept and how they get there: backends behind one small interface."""
