"""A local web page that explains uploaded images."""
