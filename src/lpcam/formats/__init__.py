"""Files of other programs: maps, labels and masks read from them and written for them."""
