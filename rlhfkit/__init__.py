"""rlhfkit"""
