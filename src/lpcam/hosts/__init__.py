"""Methods with a network of their own: AMN, EDAM and MCTformer."""
