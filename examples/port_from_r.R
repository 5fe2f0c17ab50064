# A small regression in torch for R. Line for line the program of port_from_r.py.

library(torch)
# nn_module, nn_linear, nnf_relu and
# optim_adam come with it, and so does
# nn_utils_weight_norm


Net <- nn_module(
  initialize = function() {
    # nothing to call first in R
    self$wn <- nn_utils_weight_norm$new("weight", 2) # R counts dimensions from 1
    self$fc <- nn_linear(20, 40)
    self$wn$apply(self$fc)
    self$wn_whole <- nn_utils_weight_norm$new("weight", NULL)
    self$out <- nn_linear(40, 1)
    self$wn_whole$apply(self$out)
  },
  forward = function(x) {
    self$wn$recompute(self$fc)
    self$wn_whole$recompute(self$out)
    self$out(nnf_relu(self$fc(x)))
  }
)
torch_manual_seed(1)
x <- torch_randn(64, 20)
y <- torch_sin(torch_sum(x, dim = 2, keepdim = TRUE) / 4)

net <- Net()
optimizer <- optim_adam(net$parameters, lr = 0.01)
for (i in 1:200) {
  loss <- nnf_mse_loss(net(x), y)
  optimizer$zero_grad()
  loss$backward()
  optimizer$step()
}
cat("loss:", loss$item(), "\n")
cat("shape of g:", net$fc$weight_g$shape, "\n")
cat("shape of v:", net$fc$weight_v$shape, "\n")

net$wn$remove(net$fc)
cat("parameters:", names(net$fc$parameters), "\n")
