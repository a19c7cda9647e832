"""What is said about options: to editors and `help`, and to those who come with another library's words."""
