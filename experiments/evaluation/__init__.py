"""Benchmarks of pictures: public prompt files, the folders that official scorers read, their results, and rules of our own."""
