"""Hot operations behind one signature each."""
