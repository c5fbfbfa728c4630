# Two laws of the loss over the steps, and what they promise.

ENOUGH <- 8  # points for a law of three parameters

# What a law is fitted to, but for the first tenth of the steps: the lowest held-out loss of any rank at each step where
# it was measured, if those are ENOUGH; else the population's best moving average of the training loss, a noisier one.
fitted_to <- function(metrics, over) {
  held <- metrics[is.finite(metrics$held_out), ]
  best <- data.frame(step = over$x, loss = over$best)
  lowest <- if (nrow(held)) aggregate(list(loss = held$held_out), list(step = held$step), min)
  from <- min(best$step) + 0.1 * diff(range(best$step))
  late <- lowest[lowest$step >= from, ]
  if (!is.null(late) && nrow(late) >= ENOUGH) return(list(what = "held-out loss", rows = late))
  list(what = "training loss", rows = best[best$step >= from, ])
}

# A power law and an exponential, the better by AIC first; none where there is too little to fit.
fit_laws <- function(metrics, over) {
  chosen <- fitted_to(metrics, over)
  late <- chosen$rows
  if (nrow(late) < ENOUGH) return(NULL)
  unit <- max(late$step)
  late$x <- late$step / unit
  low <- min(late$loss)
  span <- max(diff(range(late$loss)), 1e-3)
  try_from <- function(formula, start) tryCatch(
    minpack.lm::nlsLM(formula, late, start = start, lower = c(0, 0, 1e-3), upper = c(Inf, Inf, 50),
                      control = minpack.lm::nls.lm.control(maxiter = 500)), error = function(condition) NULL)
  fit <- function(name, formula, law) {
    tries <- lapply(c(0.1, 0.3, 1, 3), function(rate) try_from(formula, c(a = 0.9 * low, b = span, c = rate)))
    tries <- Filter(Negate(is.null), tries)
    if (!length(tries)) return(NULL)
    model <- tries[[which.min(vapply(tries, AIC, 0))]]
    part <- coef(model)
    error <- tryCatch(sqrt(diag(vcov(model)))[["a"]], error = function(condition) NA)
    list(name = name, what = chosen$what, from = min(late$step), aic = AIC(model), asymptote = part[["a"]],
         error = error,
         at = function(step) law(part[["a"]], part[["b"]], part[["c"]], step / unit),
         reach = function(loss) {
           left <- (loss - part[["a"]]) / part[["b"]]
           unit * if (name == "power law") left^(-1 / part[["c"]]) else -log(left) / part[["c"]]
         },
         text = if (name == "power law") {
           sprintf("%.4g + %.4g (step / %s)^-%.3g", part[["a"]], part[["b"]], count(unit), part[["c"]])
         } else sprintf("%.4g + %.4g exp(-step / %s)", part[["a"]], part[["b"]], count(unit / part[["c"]])))
  }
  laws <- Filter(Negate(is.null), list(
    fit("power law", loss ~ a + b * x^-c, function(a, b, c, x) a + b * x^-c),
    fit("exponential", loss ~ a + b * exp(-c * x), function(a, b, c, x) a + b * exp(-c * x))))
  laws[order(vapply(laws, `[[`, 0, "aic"))]
}

# The step at which the law comes to the target; NA where its asymptote is not below it.
steps_to <- function(law, target) if (target > law$asymptote) max(0, law$reach(target)) else NA

# In words: the asymptote, and when the law comes to the target.
promise <- function(law, target) {
  error <- if (is.finite(law$error)) sprintf(" ± %.2g", law$error) else ""
  asymptote <- sprintf("asymptote %.4g%s bits per byte", law$asymptote, error)
  if (is.na(target)) return(asymptote)
  wanted <- steps_to(law, target)
  reached <- if (is.na(wanted)) "is below the asymptote"
             else if (wanted > 1e15) "is out of reach" else paste("at step", count(wanted))
  paste0(asymptote, "; target ", format(target), " ", reached)
}

# What Rscript prints: every law, the better one, and the steps to the target.
report <- function(name, ranks, metrics, mixes, over, laws, target) {
  held <- metrics$held_out[is.finite(metrics$held_out)]
  cat(sprintf("%s: %s, %s, %s, best %.4f bits per byte%s\n", name, plural(length(ranks), "rank"),
              plural(max(metrics$step), "step"), mixed(mixes), min(metrics$loss, na.rm = TRUE),
              if (length(held)) sprintf(", held-out %.4f", min(held)) else ""))
  if (!length(laws)) {
    cat("no law fitted: too few points, or none converged\n")
  } else {
    cat(sprintf("fitted to the population's best %s from step %s:\n", laws[[1]]$what, count(laws[[1]]$from)))
    for (law in laws) cat(sprintf("  %-12s %-44s AIC %.1f\n", law$name, law$text, law$aic))
    cat(sprintf("better by AIC: %s, %s\n", laws[[1]]$name, promise(laws[[1]], target)))
  }
}
