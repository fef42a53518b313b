"""The encoder of a sparse autoencoder, folded to one form, and where its parts are read from."""
