"""What guidance is: hook interface, planner, noise algebra, registry, recipes. It knows no pipeline and no model."""
