"""The built-in plug-ins, one file a method; found through their entry points and attached like anybody else's."""
