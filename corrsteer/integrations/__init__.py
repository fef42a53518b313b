"""Neighbours: what makes corrsteer work inside other libraries, a file each. None is imported before it is used."""
